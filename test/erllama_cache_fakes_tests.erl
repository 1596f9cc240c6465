%% The fakes of erllama's modules are as strict as those: what they let pass, a test of the
%% writer would let pass.
-module(erllama_cache_fakes_tests).

-include_lib("eunit/include/eunit.hrl").

-import(erllama_cache_test_util, [
    actor/0, ask/2, tell/2, answer/2, kill/1, eventually/1, file_of/2, each/3, in_project/1,
    temporary_dir/1, patch/3, flip/2
]).
-import(erllama_cache_erllama_util, [load_fakes/1, load_fake/2, by_kind/2]).

-define(META, erllama_cache_meta_srv).
-define(DISK, erllama_cache_disk_srv).
-define(TIER, fake_tier).
-define(LEASE, 60000).
-define(KEY, <<7:256>>).

%% Both kinds of host.
fakes_test_() ->
    [
        {atom_to_list(KeyedBy), each(fun() -> setup(KeyedBy) end, fun teardown/1, tests())}
     || KeyedBy <- [tokens, text]
    ].

tests() ->
    [
        fun a_key_that_is_reserved_is_in_conflict/1,
        fun a_lease_runs_out/1,
        fun a_lease_is_renewed_by_each_call/1,
        fun a_lapsed_key_is_granted_anew/1,
        fun a_dead_holders_key_is_granted_anew/1,
        fun a_dead_holders_file_is_adopted_or_deleted/1,
        fun a_stale_token_is_refused/1,
        fun the_announcement_describes_the_file/1,
        fun a_file_is_inserted_that_is_what_is_said_of_it/1,
        fun the_announcement_answers_those_who_wait/1,
        fun nothing_else_answers_those_who_wait/1,
        fun a_start_sweeps_the_root/1,
        fun a_load_deletes_an_invalid_file/1,
        fun the_parser_refuses_invalid_files/1,
        fun a_writer_counts_in_its_own_slots/1,
        fun each_kind_has_its_exports/1
    ].

setup(KeyedBy) ->
    {ok, _} = application:ensure_all_started(crypto),
    ok = load_fakes(KeyedBy),
    Root = temporary_dir(?MODULE),
    ok = erllama_fake:start(?TIER, Root),
    Root.

teardown(Root) ->
    ok = erllama_fake:stop(),
    ok = load_fakes(tokens),
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
    {Path, #{key := Key} = Info} = vector(Root),
    {ok, Token} = ?META:reserve_save(Key, disk, self()),
    Later = fun() -> ok = ?META:advance(?LEASE - 5000) end,
    Later(),
    ?assertEqual(ok, ?META:check_reservation(Key, Token)),
    Later(),
    ?assertEqual(ok, ?META:mark_published(Key, Token, Path)),
    Later(),
    ?assertEqual(ok, announce(Key, Token, Info)),
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
    {Path, #{key := Key} = Info} = vector(Root),
    {ok, _} = ?META:reserve_save(Key, disk, self()),
    Stale = make_ref(),
    ?assertEqual({error, expired}, ?META:check_reservation(Key, Stale)),
    ?assertEqual({error, expired}, ?META:mark_published(Key, Stale, Path)),
    ?assertEqual({error, expired}, announce(Key, Stale, Info)),
    ?assertEqual(ok, ?META:cancel_reservation(Key, Stale)),
    ?assertMatch([{Key, _}], ?META:reserved()).

the_announcement_describes_the_file(Root) ->
    {Path, #{key := Key} = Info} = vector(Root),
    {ok, Token} = ?META:reserve_save(Key, disk, self()),
    Announce = fun(Said) -> fun() -> announce(Key, Token, Said) end end,
    breaks(Announce(Info)),
    breaks(fun() -> ?META:mark_published(Key, Token, Path ++ ".not") end),
    ok = ?META:mark_published(Key, Token, Path),
    [breaks(Announce(Said)) || Said <- wrong(Info)],
    {ok, Other} = reserve(),
    breaks(fun() -> ?META:mark_published(?KEY, Other, Path) end),
    ?assertEqual(ok, (Announce(Info))()).

%% A file that somebody else has put into the root.
a_file_is_inserted_that_is_what_is_said_of_it(Root) ->
    {Path, #{key := Key} = Info} = vector(Root),
    {ok, Token} = ?META:reserve_save(Key, disk, self()),
    {Waiter, Waiting} = waits_for(Key, 100000),
    breaks(fun() -> insert(Key, Path, Info) end),
    ok = ?META:cancel_reservation(Key, Token),
    [breaks(fun() -> insert(Key, Path, Said) end) || Said <- wrong(Info)],
    breaks(fun() -> insert(?KEY, Path, Info) end),
    ?assertEqual(ok, insert(Key, Path, Info)),
    ?assertEqual(stored, answer(Waiter, Waiting)),
    ?assertEqual([Key], ?META:stored()).

%% What is not so of a file.
wrong(#{size := Size, tokens := Tokens, prompt_text := Text} = Info) ->
    [
        Info#{size := Size + 1}, Info#{header := <<0:384>>},
        Info#{tokens := <<Tokens/binary, 0:32>>}
    ] ++ by_kind([], [Info#{prompt_text := <<Text/binary, "!">>}]).

breaks(Call) ->
    ?assertError({breaks_the_contract, _}, Call()).

announce(Key, Token, #{size := Size, header := Header} = Info) ->
    apply(?META, announce_saved, [Key, Token, Size, Header | content(Info)]).

insert(Key, Path, #{size := Size, header := Header} = Info) ->
    apply(?META, insert_available, [Key, disk, Size, Header, {disk, Path} | content(Info)]).

%% What a file holds, as this kind of host is told of it.
content(#{tokens := Tokens, prompt_text := Text}) ->
    [Tokens | by_kind([], [byte_size(Text)])].

the_announcement_answers_those_who_wait(Root) ->
    {Path, #{key := Key} = Info} = vector(Root),
    ?assertEqual(miss, ?META:await(Key, 100000)),
    {ok, Token} = ?META:reserve_save(Key, disk, self()),
    {Waiter, Waiting} = waits_for(Key, 100000),
    ok = ?META:check_reservation(Key, Token),
    ok = ?META:mark_published(Key, Token, Path),
    ?assertEqual([Key], ?META:waiting()),
    ok = announce(Key, Token, Info),
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
    %% Whole, but of the other kind of host.
    {_, _} = of_the_other_version(Root),
    ok = gen_server:stop(?TIER),
    {ok, _} = ?DISK:start(?TIER, Root),
    ?assertEqual(lists:sort([Path, Other]), lists:sort(filelib:wildcard(filename:join(Root, "*")))).

a_load_deletes_an_invalid_file(Root) ->
    {Path, #{key := Key}} = vector(Root),
    {ok, Payload} = file:read_file(filename:join(vectors(), "02.payload")),
    ?assertMatch({ok, #{key := Key}, Payload}, ?DISK:load(?TIER, Key)),
    ok = file:write_file(Path, <<"KVC", (erllama_fake_kvc:version())>>),
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
    {Other, NoReason} = by_kind({2, 6}, {1, 7}),
    [
        ?assertEqual({What, {error, Reason}}, {What, erllama_fake_kvc:parse(Bad)})
     || {What, Reason, Bad} <- [
            {magic, no_magic, patch(File, 0, <<"KVD">>)},
            {version, {unknown_version, Other}, patch(File, 3, <<Other>>)},
            {later_version, {unknown_version, 3}, patch(File, 3, <<3>>)},
            {save_reason, {unknown_save_reason, NoReason}, patch(File, 5, <<NoReason>>)},
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
    in_project(by_kind("test/vectors", "test/vectors2")).

%% The same of the kind of host that this is not.
of_the_other_version(Root) ->
    KeyedBy = erllama_fake:keyed_by(),
    ok = load_fake(erllama_fake_kvc, by_kind(text, tokens)),
    try
        vector(Root)
    after
        ok = load_fake(erllama_fake_kvc, KeyedBy)
    end.

%%% The counters

a_writer_counts_in_its_own_slots(_Root) ->
    Own = [4, 5, 6, 7, 8, 10, 16, 20] ++ by_kind([], [22]),
    [?assertEqual(ok, erllama_cache_counters:incr(Slot)) || Slot <- Own],
    [
        ?assertError(function_clause, erllama_cache_counters:incr(Slot))
     || Slot <- lists:seq(0, 33) -- Own
    ].

%%% The kinds

%% What the one kind has the other must not have: a writer that calls it would find it there.
each_kind_has_its_exports(_Root) ->
    OfTokens = [{erllama_cache_key, make, 4}, {?META, announce_saved, 5},
                {?META, insert_available, 6}],
    OfText = [{erllama_cache_key, make_text, 4}, {erllama_cache_key, namespace, 3},
              {?META, announce_saved, 6}, {?META, insert_available, 7}],
    Exported = [
        {Module, Function, Arity}
     || {Module, Function, Arity} <- OfTokens ++ OfText,
        erlang:function_exported(Module, Function, Arity)
    ],
    ?assertEqual(by_kind(OfTokens, OfText), Exported).
