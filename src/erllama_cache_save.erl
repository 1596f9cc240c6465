%% One save, from the metadata to the announcement, in the process that has a slot for it: the host
%% computes a key and reserves room, the library writes and publishes slice by slice, and the host
%% announces the file. docs/design/save.md has the order and its reasons.
%%
%% @private
-module(erllama_cache_save).

-export([run/7]).
-export_type([stop/0]).

%% Up to this many bytes of file, a save is one call of the library.
-define(ONE_CALL, 65536).

%% What stops a save before its file has its name: `{Ref, [Monitor]}', a message that cancels it and
%% its caller's death.
-type stop() :: never | {reference(), [reference()]}.

%% One save: what it is about, and how far it is.
-record(save, {
    host :: module(),
    guard :: erllama_cache_nif:guard(),
    tier_srv :: erllama_cache_host:tier_srv(),
    tier :: erllama_cache_host:tier(),
    reason :: atom(),
    key :: erllama_cache_writer:key(),
    content :: erllama_cache_host:content(),
    plan :: erllama_cache_nif:save_plan(),
    payload :: binary(),
    size :: pos_integer(),
    stop :: stop(),
    %% When the lease was renewed last.
    renewed :: integer(),
    %% Of the reservation, once there is one.
    token :: undefined | erllama_cache_host:token(),
    root :: undefined | file:name_all(),
    %% The temporary file, once there is one: whether more of it is to be written.
    tmp :: undefined | erllama_cache_nif:tmp(),
    progress = more :: ok | more
}).

%% A save that has its slot.
-spec run(erllama_cache_setup:setup(), erllama_cache_nif:guard(), erllama_cache_host:tier_srv(),
          erllama_cache_host:tier(), erllama_cache_meta:build_meta(), Payload :: binary(),
          stop()) ->
    {ok, erllama_cache_writer:key()} | {error, term()}.
run(#{options := Options, defaults := Defaults} = Setup, Guard, TierSrv, Tier, BuildMeta, Payload,
    Stop) ->
    {Host, KeyedBy} = host(TierSrv, Setup),
    case identify(Host, KeyedBy, BuildMeta, Defaults) of
        {ok, #{save_reason := Reason} = Meta, {Key, QuantByte, {_, Tokens, _} = Content}} ->
            reserve(#save{
                host = Host, guard = Guard, tier_srv = TierSrv, tier = Tier, reason = Reason,
                key = Key, content = Content,
                plan = {Key, KeyedBy, Meta, QuantByte, Tokens, map_get(Tier, Options)},
                payload = Payload, size = file_size(Meta, Tokens, Payload), stop = Stop,
                renewed = erlang:monotonic_time(millisecond)
            });
        {error, _} = Error ->
            Error
    end.

identify(Host, KeyedBy, BuildMeta, Defaults) ->
    case erllama_cache_meta:complete(KeyedBy, BuildMeta, Defaults) of
        {ok, Meta} ->
            case Host:identify(KeyedBy, Meta) of
                {ok, Identity} -> {ok, Meta, Identity};
                {error, _} = Error -> Error
            end;
        {error, _} = Error ->
            Error
    end.

reserve(#save{host = Host, tier_srv = TierSrv, tier = Tier, key = Key, size = Size} = Save) ->
    case Host:reserve(TierSrv, Tier, Key, Size) of
        {ok, Token} ->
            steps([fun begin_write/1, fun write/1, fun publish/1], Save#save{token = Token});
        {error, already_present} = Error ->
            ok = Host:count(TierSrv, duplicate_dropped),
            Error;
        {error, _} = Error ->
            Error
    end.

%% Beside erllama a node may have stores: each of them is its own host.
host(TierSrv, #{host := Host, keyed_by := KeyedBy}) when
    Host =:= erllama_cache_host_erllama; Host =:= erllama_cache_store
->
    case erllama_cache_store:find_keyed_by(TierSrv) of
        {ok, KeyedByOfStore} -> {erllama_cache_store, KeyedByOfStore};
        error -> {Host, KeyedBy}
    end;
host(_TierSrv, #{host := Host, keyed_by := KeyedBy}) ->
    {Host, KeyedBy}.

%% How long the file will be, for a host that makes room: exact but for the fixed fields and tags,
%% for which 256 bytes are more than enough.
file_size(#{prompt_text := Prompt, hostname := Hostname, erllama_version := Version,
            save_reason_detail := Detail}, Tokens, Payload) ->
    256 + byte_size(Prompt) + byte_size(Hostname) + byte_size(Version) + byte_size(Detail) +
        byte_size(Tokens) + byte_size(Payload).

%% Takes the steps of a save whose reservation is ours. Whatever ends it before the file is
%% published drops the temporary file and cancels the reservation, unless that was lost: then it
%% belongs to another save.
steps([Step | Steps], Save) ->
    try Step(Save) of
        {next, Next} ->
            steps(Steps, Next);
        {published, {ok, Outcome, Size, Header}, Published} ->
            ok = count_outcome(Outcome),
            announce(Size, Header, Published);
        {lost, Error} ->
            ok = drop_tmp(Save),
            Error;
        {error, _} = Error ->
            ok = drop_tmp(Save),
            cancel_reservation(Save),
            Error
    catch
        Class:Reason:Stack ->
            ok = drop_tmp(Save),
            cancel_after_exception(Save),
            erlang:raise(Class, Reason, Stack)
    end.

%% If a call of the library failed, the file is gone already, and this does nothing.
drop_tmp(#save{tmp = undefined}) -> ok;
drop_tmp(#save{tmp = Tmp}) -> erllama_cache_nif:abort(Tmp).

begin_write(#save{host = Host, tier_srv = TierSrv} = Save) ->
    Root = Host:root(TierSrv),
    case native(Root) of
        {ok, Path} -> begun(first_call(Path, Save), Save#save{root = Root});
        {error, _} = Error -> Error
    end.

native({error, _} = Error) -> Error;
native(Root) -> erllama_cache_path:native(Root).

begun({ok, _Outcome, _Size, _Header} = Published, Save) ->
    {published, Published, Save};
begun({Progress, Tmp}, Save) when Progress =:= ok; Progress =:= more ->
    {next, Save#save{tmp = Tmp, progress = Progress}};
begun(Ended, _Save) ->
    Ended.

first_call(Path, #save{size = Size} = Save) when Size =< ?ONE_CALL ->
    %% A change to a dirty scheduler and back takes longer than the write of a few pages, so one
    %% call does it all; the reservation, milliseconds old, is checked before it.
    case check(Save) of
        ok -> write_and_publish(Path, Save);
        {lost, _} = Lost -> Lost
    end;
first_call(Path, #save{guard = Guard, plan = Plan, payload = Payload} = Save) ->
    in_turn(Save, fun(Turn) ->
        erllama_cache_nif:write_tmp(Turn, Guard, Path, Plan, Payload)
    end).

write_and_publish(Path, #save{tier = ram_file, guard = Guard, plan = Plan,
                              payload = Payload} = Save) ->
    case erllama_cache_nif:write_and_publish_in_memory(Guard, Path, Plan, Payload) of
        on_device -> write_and_publish(Path, Save#save{tier = disk});
        Written -> Written
    end;
write_and_publish(Path, #save{guard = Guard, plan = Plan, payload = Payload} = Save) ->
    in_turn(Save, fun(Turn) ->
        erllama_cache_nif:write_and_publish(Turn, Guard, Path, Plan, Payload)
    end).

%% Writes the rest, a slice at a time, and checks the reservation before the file is published.
write(#save{stop = Stop, progress = Progress} = Save) ->
    case stopped(Stop) of
        true ->
            {error, cancelled};
        false when Progress =:= ok ->
            case check(Save) of
                ok -> {next, Save};
                {lost, _} = Lost -> Lost
            end;
        false ->
            case write_slice(Save) of
                {next, Next} -> write(Next);
                Ended -> Ended
            end
    end.

write_slice(#save{guard = Guard, tmp = Tmp, payload = Payload} = Save) ->
    case renew(Save) of
        {lost, _} = Lost ->
            Lost;
        Renewed ->
            Slice = fun(Turn) -> erllama_cache_nif:write_more(Turn, Guard, Tmp, Payload) end,
            case in_turn(Save, Slice) of
                Progress when is_atom(Progress) -> {next, Renewed#save{progress = Progress}};
                Ended -> Ended
            end
    end.

publish(Save) ->
    published(in_turn(Save, publish_call(Save)), Save).

published(more, Save) ->
    Renewed = renew_if_it_stands(Save),
    Meanwhile = fun() ->
        _ = renew_if_it_stands(Renewed),
        ok
    end,
    published(in_turn_while(Meanwhile, publish_call(Renewed)), Renewed);
published({ok, _Outcome, _Size, _Header} = Published, Save) ->
    {published, Published, Save};
published(Ended, _Save) ->
    Ended.

publish_call(#save{guard = Guard, tmp = Tmp}) ->
    fun(Turn) -> erllama_cache_nif:publish(Turn, Guard, Tmp) end.

%% A call of the library in its turn. On a slow disk the turn may be long in coming: the lease is
%% renewed meanwhile. If it is lost then, the call is not made.
in_turn(Save, Call) ->
    in_turn_while(fun() -> check(Save) end, Call).

in_turn_while(Meanwhile, Call) ->
    case erllama_cache_io_limit:run(Call, erllama_cache_host:renew_every(), Meanwhile) of
        {gave_up, Lost} -> Lost;
        Result -> Result
    end.

%% A disk that takes longer than the lease must not lose a save that goes well.
renew(#save{renewed = Renewed} = Save) ->
    Now = erlang:monotonic_time(millisecond),
    case Now - Renewed < erllama_cache_host:renew_every() orelse check(Save) of
        true -> Save;
        ok -> Save#save{renewed = Now};
        {lost, _} = Lost -> Lost
    end.

check(#save{host = Host, tier_srv = TierSrv, key = Key, token = Token}) ->
    case Host:check(TierSrv, Key, Token) of
        ok -> ok;
        {error, _} = Error -> {lost, Error}
    end.

%% The file may have its name already. Whether the reservation was lost, or the host does not
%% answer, is for mark_published to say.
renew_if_it_stands(Save) ->
    try renew(Save) of
        {lost, _} -> Save;
        Renewed -> Renewed
    catch
        _:_ -> Save
    end.

%% Whether a save must stop, because it was cancelled or its caller has died.
stopped(never) ->
    false;
stopped({Ref, []}) ->
    receive
        {erllama_cache_writer, cancel, Ref} -> true
    after 0 -> false
    end;
stopped({Ref, [Monitor]}) ->
    receive
        {erllama_cache_writer, cancel, Ref} -> true;
        {'DOWN', Monitor, process, _, _} -> true
    after 0 -> false
    end.

count_outcome(linked) -> ok;
count_outcome(adopted) -> erllama_cache_counts:count(adoptions);
count_outcome(replaced) -> erllama_cache_counts:count(replacements).

%% The file stays from here on, whatever the host answers: it is whole, and the host adopts it.
announce(Size, Header, #save{host = Host, tier_srv = TierSrv, key = Key, token = Token,
                             root = Root, content = Content, reason = Reason}) ->
    Answer =
        case Host:mark_published(TierSrv, Key, Token, Root) of
            ok -> Host:announce(TierSrv, Key, Token, Size, Header, Content);
            {error, _} = Expired -> Expired
        end,
    case Answer of
        ok ->
            ok = Host:count(TierSrv, {saved, Reason}),
            {ok, Key};
        {error, _} = Error ->
            Error
    end.

cancel_reservation(#save{host = Host, tier_srv = TierSrv, key = Key, token = Token}) ->
    ok = Host:cancel(TierSrv, Key, Token).

%% The caller has to see the first exception. A host that cannot cancel either has no reservation to
%% leave behind, or forgets it when this process dies or its lease ends.
cancel_after_exception(Save) ->
    try
        cancel_reservation(Save)
    catch
        _:_ -> ok
    end.
