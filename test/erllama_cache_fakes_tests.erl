%% The fakes of erllama's modules are as strict as those: what they let pass, a test of the
%% writer would let pass.
-module(erllama_cache_fakes_tests).

-include_lib("eunit/include/eunit.hrl").

-import(erllama_cache_test_util, [
    actor/0, ask/2, tell/2, answer/2, kill/1, eventually/1, file_of/2, each/3, temporary_dir/1,
    patch/3, flip/2
]).

-define(META, erllama_cache_meta_srv).
-define(DISK, erllama_cache_disk_srv).
-define(TIER, fake_tier).
-define(LEASE, 60000).
-define(KEY, <<7:256>>).

fake_test_() ->
    each(fun setup/0, fun teardown/1, [
        fun a_key_that_is_reserved_is_in_conflict/1,
        fun a_lease_runs_out/1,
        fun a_lease_is_renewed_by_each_call/1,
        fun a_lapsed_key_is_granted_anew/1,
        fun a_dead_holders_key_is_granted_anew/1,
        fun a_dead_holders_file_is_adopted_or_deleted/1,
        fun a_stale_token_is_refused/1,
        fun the_announcement_describes_the_file/1,
        fun the_announcement_answers_those_who_wait/1,
        fun nothing_else_answers_those_who_wait/1,
        fun a_start_sweeps_the_root/1,
        fun a_load_deletes_an_invalid_file/1,
        fun the_parser_refuses_invalid_files/1,
        fun a_writer_counts_in_its_own_slots/1
    ]).

setup() ->
    {ok, _} = application:ensure_all_started(crypto),
    Root = temporary_dir(?MODULE),
    ok = erllama_fake:start(?TIER, Root),
    Root.

teardown(Root) ->
    ok = erllama_fake:stop(),
    ok = file:del_dir_r(Root).

%%% The metadata server

a_key_that_is_reserved_is_in_conflict(_Root) ->
    {ok, _} = reserve(),
    ?assertEqual({error, conflict}, reserve()),
    ?assertEqual({error, conflict}, ask(actor(), fun reserve/0)).

a_lease_runs_out(_Root) ->
    {ok, Token} = reserve(),
    ok = ?META:advance(?LEASE - 5000),
    ?assertEqual(ok, ?META:check_reservation(?KEY, Token)),
    ok = ?META:advance(?LEASE),
    ?assertEqual({error, expired}, ?META:check_reservation(?KEY, Token)).

a_lease_is_renewed_by_each_call(Root) ->
    {Path, #{key := Key, size := Size, header := Header, tokens := Tokens}} = vector(Root),
    {ok, Token} = ?META:reserve_save(Key, disk, self()),
    Later = fun() -> ok = ?META:advance(?LEASE - 5000) end,
    Later(),
    ?assertEqual(ok, ?META:check_reservation(Key, Token)),
    Later(),
    ?assertEqual(ok, ?META:mark_published(Key, Token, Path)),
    Later(),
    ?assertEqual(ok, ?META:announce_saved(Key, Token, Size, Header, Tokens)),
    ?assertEqual([Key], ?META:stored()),
    ?assertEqual({error, already_present}, ?META:reserve_save(Key, disk, self())).

a_lapsed_key_is_granted_anew(_Root) ->
    {ok, Token} = reserve(),
    ok = ?META:advance(?LEASE),
    Other = actor(),
    {ok, Next} = ask(Other, fun reserve/0),
    ?assertEqual([{?KEY, Next}], ?META:reserved()),
    ?assertEqual({error, expired}, ?META:check_reservation(?KEY, Token)),
    ?assertEqual({error, conflict}, reserve()),
    %% The first holder's death is nothing to the second, nor is its giving up.
    ?assertEqual(ok, ?META:cancel_reservation(?KEY, Token)),
    ?assertEqual(ok, ?META:check_reservation(?KEY, Next)).

a_dead_holders_key_is_granted_anew(_Root) ->
    Holder = actor(),
    {ok, Token} = ask(Holder, fun reserve/0),
    kill(Holder),
    {ok, _} = reserve(),
    ?assertEqual({error, expired}, ?META:check_reservation(?KEY, Token)).

a_dead_holders_file_is_adopted_or_deleted(Root) ->
    {Path, #{key := Key}} = vector(Root),
    {ok, Whole} = file:read_file(Path),
    Last = byte_size(Whole) - 1,
    <<Before:Last/binary, Byte>> = Whole,
    [
        begin
            Holder = actor(),
            ok = ask(Holder, fun() ->
                {ok, Token} = ?META:reserve_save(Key, disk, self()),
                ?META:mark_published(Key, Token, Path)
            end),
            ok = file:write_file(Path, File),
            kill(Holder),
            eventually(fun() -> ?META:reserved() =:= [] end),
            ?assertEqual(Stored, ?META:stored()),
            ?assertEqual(Stored =/= [], filelib:is_regular(Path)),
            ok = file:write_file(Path, Whole),
            ok = ?META:forget(Key)
        end
     || {File, Stored} <- [{Whole, [Key]}, {<<Before/binary, (Byte bxor 1)>>, []}]
    ].

a_stale_token_is_refused(Root) ->
    {Path, #{key := Key, size := Size, header := Header, tokens := Tokens}} = vector(Root),
    {ok, _} = ?META:reserve_save(Key, disk, self()),
    Stale = make_ref(),
    ?assertEqual({error, expired}, ?META:check_reservation(Key, Stale)),
    ?assertEqual({error, expired}, ?META:mark_published(Key, Stale, Path)),
    ?assertEqual({error, expired}, ?META:announce_saved(Key, Stale, Size, Header, Tokens)),
    ?assertEqual(ok, ?META:cancel_reservation(Key, Stale)),
    ?assertMatch([{Key, _}], ?META:reserved()).

the_announcement_describes_the_file(Root) ->
    {Path, #{key := Key, size := Size, header := Header, tokens := Tokens}} = vector(Root),
    {ok, Token} = ?META:reserve_save(Key, disk, self()),
    Breaks = fun(Call) -> ?assertError({breaks_the_contract, _}, Call()) end,
    Announce = fun(S, H, T) -> fun() -> ?META:announce_saved(Key, Token, S, H, T) end end,
    Breaks(Announce(Size, Header, Tokens)),
    Breaks(fun() -> ?META:mark_published(Key, Token, Path ++ ".not") end),
    ok = ?META:mark_published(Key, Token, Path),
    Breaks(Announce(Size + 1, Header, Tokens)),
    Breaks(Announce(Size, <<0:384>>, Tokens)),
    Breaks(Announce(Size, Header, <<Tokens/binary, 0:32>>)),
    {ok, Other} = reserve(),
    Breaks(fun() -> ?META:mark_published(?KEY, Other, Path) end),
    ?assertEqual(ok, (Announce(Size, Header, Tokens))()).

the_announcement_answers_those_who_wait(Root) ->
    {Path, #{key := Key, size := Size, header := Header, tokens := Tokens}} = vector(Root),
    ?assertEqual(miss, ?META:await(Key, 100000)),
    {ok, Token} = ?META:reserve_save(Key, disk, self()),
    {Waiter, Waiting} = waits_for(Key, 100000),
    ok = ?META:check_reservation(Key, Token),
    ok = ?META:mark_published(Key, Token, Path),
    ?assertEqual([Key], ?META:waiting()),
    ok = ?META:announce_saved(Key, Token, Size, Header, Tokens),
    ?assertEqual(stored, answer(Waiter, Waiting)),
    ?assertEqual(stored, ?META:await(Key, 0)).

nothing_else_answers_those_who_wait(_Root) ->
    Holder = actor(),
    {ok, Token} = ask(Holder, fun reserve/0),
    {Waiter, Waiting} = waits_for(?KEY, 300),
    ok = ?META:cancel_reservation(?KEY, Token),
    {ok, _} = ask(Holder, fun reserve/0),
    kill(Holder),
    ?assertEqual([?KEY], ?META:waiting()),
    ?assertEqual(miss, answer(Waiter, Waiting)).

waits_for(Key, Timeout) ->
    Waiter = actor(),
    Waiting = tell(Waiter, fun() -> ?META:await(Key, Timeout) end),
    eventually(fun() -> ?META:waiting() =:= [Key] end),
    {Waiter, Waiting}.

reserve() ->
    ?META:reserve_save(?KEY, disk, self()).

%%% The tier server

a_start_sweeps_the_root(Root) ->
    {Path, _} = vector(Root),
    [Tmp, Corrupt, Other] = [filename:join(Root, Name) || Name <- ["a.tmp", "b.kvc", "c.txt"]],
    [ok = file:write_file(File, <<"not a cache file">>) || File <- [Tmp, Corrupt, Other]],
    ok = gen_server:stop(?TIER),
    {ok, _} = ?DISK:start(?TIER, Root),
    ?assertEqual(lists:sort([Path, Other]), lists:sort(filelib:wildcard(filename:join(Root, "*")))).

a_load_deletes_an_invalid_file(Root) ->
    {Path, #{key := Key}} = vector(Root),
    {ok, Payload} = file:read_file(filename:join(vectors(), "02.payload")),
    ?assertMatch({ok, #{key := Key}, Payload}, ?DISK:load(?TIER, Key)),
    ok = file:write_file(Path, <<"KVC", 1>>),
    ?assertEqual({error, malformed}, ?DISK:load(?TIER, Key)),
    ?assertEqual(miss, ?DISK:load(?TIER, Key)),
    ?assertEqual(#{10 => 1}, erllama_cache_counters:all()).

%%% The parser

the_parser_refuses_invalid_files(Root) ->
    {Path, #{tags := Tags}} = vector(Root),
    {ok, File} = file:read_file(Path),
    ?assertMatch({ok, _, _}, erllama_fake_kvc:parse(File)),
    Renamed = filename:join(Root, lists:duplicate(64, $0) ++ ".kvc"),
    {ok, _} = file:copy(Path, Renamed),
    ?assertEqual({error, name_is_not_the_key}, erllama_fake_kvc:read(Renamed)),
    ok = file:delete(Renamed),
    <<QuantByte>> = maps:get(16#03, Tags),
    QuantTag = <<16#03, 1:32/little, QuantByte>>,
    {QuantAt, 6} = binary:match(File, QuantTag),
    [
        ?assertEqual({What, {error, Reason}}, {What, erllama_fake_kvc:parse(Bad)})
     || {What, Reason, Bad} <- [
            {magic, no_magic, patch(File, 0, <<"KVD">>)},
            {version, {unknown_version, 2}, patch(File, 3, <<2>>)},
            {save_reason, {unknown_save_reason, 6}, patch(File, 5, <<6>>)},
            {token_count, token_count, patch(File, 8, <<1000:32/little>>)},
            {payload_bytes, payload_bytes, patch(File, 40, <<1:64>>)},
            {payload_offset, payload_offset, patch(File, 48, <<1:64>>)},
            {crc, crc, flip(File, 64)},
            {payload, crc, flip(File, byte_size(File) - 1)},
            {trailing, payload_length, <<File/binary, 0>>},
            {cut, payload_length, binary:part(File, 0, byte_size(File) - 1)},
            {header_only, malformed, binary:part(File, 0, 48)},
            {quant_byte, {unknown_quant_byte, 255}, patch(File, QuantAt + 5, <<255>>)},
            {repeated, {repeated_tag, 1}, patch(File, QuantAt, <<1>>)},
            {missing, {missing_tag, 3}, patch(File, QuantAt, <<16#83>>)}
        ]
    ].

%% A file of another implementation's, under its name in the root.
vector(Root) ->
    {ok, File} = file:read_file(filename:join(vectors(), "02.kvc")),
    {ok, #{key := Key} = Info, _Payload} = erllama_fake_kvc:parse(File),
    Path = file_of(Root, Key),
    ok = file:write_file(Path, File),
    {Path, Info}.

vectors() ->
    filename:join(filename:dirname(code:which(?MODULE)), "vectors").

%%% The counters

a_writer_counts_in_its_own_slots(_Root) ->
    [?assertEqual(ok, erllama_cache_counters:incr(Slot)) || Slot <- [4, 5, 6, 7, 8, 10, 16]],
    [
        ?assertError(function_clause, erllama_cache_counters:incr(Slot))
     || Slot <- [0, 3, 9, 11, 15, 17, 20, 22]
    ].
