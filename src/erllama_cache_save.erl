%% One save, from the metadata to the announcement, in the process that has a slot for it: the host
%% is asked for a key and a reservation, the library writes and publishes, slice by slice, and the
%% host is told. docs/design.md, "A save", has the order and why it is that.
%%
%% @private
-module(erllama_cache_save).

-export([run/7]).
-export_type([stop/0, setup/0]).

%% Up to this many bytes of file, a save is one call of the library.
-define(SMALL, 65536).

-type setup() :: #{
    host := module(),
    defaults := erllama_cache_meta:defaults(),
    options := #{erllama_cache_host:tier() => erllama_cache_nif:save_options()},
    atom() => term()
}.
%% What the writer is configured to.

%% What stops a save before its file has its name: `{Ref, [Monitor]}', a message that cancels it and
%% its caller's death.
-type stop() :: never | {reference(), [reference()]}.

%% One save: what it is about, and what has been found out on the way.
-record(save, {
    host :: module(),
    guard :: erllama_cache_nif:guard(),
    tier_srv :: erllama_cache_host:tier_srv(),
    tier :: erllama_cache_host:tier(),
    meta :: erllama_cache_meta:complete(),
    payload :: binary(),
    options :: erllama_cache_nif:save_options(),
    key :: erllama_cache_writer:key(),
    quant_byte :: byte(),
    tokens :: binary(),
    size :: pos_integer(),
    %% None yet before it is reserved.
    token :: undefined | erllama_cache_host:token(),
    stop :: stop(),
    renewed :: integer()
}).

%% A save that has its slot.
-spec run(setup(), erllama_cache_nif:guard(), erllama_cache_host:tier_srv(),
          erllama_cache_host:tier(), erllama_cache_meta:build_meta(), Payload :: binary(),
          stop()) ->
    {ok, erllama_cache_writer:key()} | {error, term()}.
run(#{host := Default, defaults := Defaults, options := Options}, Guard, TierSrv, Tier, BuildMeta,
    Payload, Stop) ->
    Host = host(TierSrv, Default),
    case identify(Host, BuildMeta, Defaults) of
        {ok, Meta, {Key, QuantByte, Tokens}} ->
            reserve(#save{
                host = Host, guard = Guard, tier_srv = TierSrv, tier = Tier, meta = Meta,
                payload = Payload, options = map_get(Tier, Options), key = Key,
                quant_byte = QuantByte, tokens = Tokens, size = file_size(Meta, Tokens, Payload),
                stop = Stop, renewed = erlang:monotonic_time(millisecond)
            });
        {error, _} = Error ->
            Error
    end.

identify(Host, BuildMeta, Defaults) ->
    case erllama_cache_meta:complete(BuildMeta, Defaults) of
        {ok, Meta} ->
            case Host:identify(Meta) of
                {ok, Identity} -> {ok, Meta, Identity};
                {error, _} = Error -> Error
            end;
        {error, _} = Error ->
            Error
    end.

reserve(#save{host = Host, tier_srv = TierSrv, tier = Tier, key = Key, size = Size} = Save) ->
    case Host:reserve(TierSrv, Tier, Key, Size) of
        {ok, Token} ->
            save_reserved(Save#save{token = Token});
        {error, already_present} = Error ->
            ok = Host:count(TierSrv, duplicate_dropped),
            Error;
        {error, _} = Error ->
            Error
    end.

%% Beside erllama a node may have stores: each of them is its own host.
host(TierSrv, erllama_cache_host_erllama = Default) ->
    case erllama_cache_store:is_store(TierSrv) of
        true -> erllama_cache_store;
        false -> Default
    end;
host(_TierSrv, Host) ->
    Host.

%% What the file will take, for a host that makes room: exact but for the fixed fields and tags,
%% which are less than this.
file_size(#{prompt_text := Prompt, hostname := Hostname, erllama_version := Version,
            save_reason_detail := Detail}, Tokens, Payload) ->
    256 + byte_size(Prompt) + byte_size(Hostname) + byte_size(Version) + byte_size(Detail) +
        byte_size(Tokens) + byte_size(Payload).

%% The reservation is ours: whatever ends the save before the file is published gives it up.
save_reserved(#save{host = Host, tier_srv = TierSrv} = Save) ->
    try
        Root = Host:root(TierSrv),
        {Root, begin_write(native(Root), Save)}
    of
        {Root1, {ok, Outcome, Size, Header}} ->
            ok = count_outcome(Outcome),
            announce(Root1, Size, Header, Save);
        {Root1, {Progress, Tmp}} when Progress =:= ok; Progress =:= more ->
            save_begun(Progress, Root1, Tmp, Save);
        {_Root, {lost, Error}} ->
            Error;
        {_Root, {error, _} = Error} ->
            cancel_reservation(Save),
            Error
    catch
        Class:Reason:Stack ->
            cancel_after_exception(Save),
            erlang:raise(Class, Reason, Stack)
    end.

native({error, _} = Error) -> Error;
native(Root) -> erllama_cache_path:native(Root).

begin_write({ok, Path}, #save{size = Size} = Save) when Size =< ?SMALL ->
    %% The way to a dirty scheduler and back takes longer than the write of a few pages, so there is
    %% at most one way for all; the reservation, milliseconds old, is checked before it.
    case check(Save) of
        ok -> write_and_publish(Path, Save);
        {error, _} = Error -> {lost, Error}
    end;
begin_write({ok, Path}, #save{guard = Guard, key = Key, meta = Meta, quant_byte = QuantByte,
                              tokens = Tokens, payload = Payload, options = Options} = Save) ->
    in_turn(Save, fun(Turn) ->
        erllama_cache_nif:write_tmp(
            Turn, Guard, Path, Key, Meta, QuantByte, Tokens, Payload, Options
        )
    end);
begin_write({error, _} = Error, _Save) ->
    Error.

write_and_publish(Path, #save{tier = ram_file, guard = Guard, key = Key, meta = Meta,
                              quant_byte = QuantByte, tokens = Tokens, payload = Payload,
                              options = Options} = Save) ->
    Written = erllama_cache_nif:write_and_publish_in_memory(
        Guard, Path, Key, Meta, QuantByte, Tokens, Payload, Options
    ),
    case Written of
        on_device -> write_and_publish(Path, Save#save{tier = disk});
        _ -> Written
    end;
write_and_publish(Path, #save{guard = Guard, key = Key, meta = Meta, quant_byte = QuantByte,
                              tokens = Tokens, payload = Payload, options = Options} = Save) ->
    in_turn(Save, fun(Turn) ->
        erllama_cache_nif:write_and_publish(
            Turn, Guard, Path, Key, Meta, QuantByte, Tokens, Payload, Options
        )
    end).

%% A call of the library in its turn. On a disk that is slow the turn may be long in coming: the
%% lease is renewed meanwhile. If it is lost then, the call is not made.
in_turn(Save, Call) ->
    Check = fun() -> check(Save) end,
    case erllama_cache_io_limit:run(Call, erllama_cache_host:renew_every(), Check) of
        {gave_up, Error} -> {lost, Error};
        Result -> Result
    end.

%% There is a temporary file: a failed call has dropped it, everything else has to.
save_begun(Progress, Root, Tmp, Save) ->
    try write_rest(Progress, Tmp, Save) of
        written ->
            publish(Root, Tmp, Save);
        {failed, Error} ->
            cancel_reservation(Save),
            Error;
        {stopped, Error} ->
            ok = erllama_cache_nif:abort(Tmp),
            cancel_reservation(Save),
            Error;
        {lost, Error} ->
            %% The reservation is somebody else's by now, and not ours to cancel.
            ok = erllama_cache_nif:abort(Tmp),
            Error
    catch
        Class:Reason:Stack ->
            ok = erllama_cache_nif:abort(Tmp),
            cancel_after_exception(Save),
            erlang:raise(Class, Reason, Stack)
    end.

write_rest(Progress, Tmp, #save{stop = Stop} = Save) ->
    case stopped(Stop) of
        true -> {stopped, {error, cancelled}};
        false -> go_on(Progress, Tmp, Save)
    end.

go_on(ok, _Tmp, Save) ->
    case check(Save) of
        ok -> written;
        {error, _} = Error -> {lost, Error}
    end;
go_on(more, Tmp, #save{guard = Guard, payload = Payload} = Save) ->
    case renew(Save) of
        {ok, Renewed} ->
            Slice = fun(Turn) -> erllama_cache_nif:write_more(Turn, Guard, Tmp, Payload) end,
            case in_turn(Save, Slice) of
                {error, _} = Error -> {failed, Error};
                {lost, _} = Lost -> Lost;
                Progress -> write_rest(Progress, Tmp, Renewed)
            end;
        {error, _} = Error ->
            {lost, Error}
    end.

%% A disk that takes longer than the lease must not lose a save that goes well.
renew(#save{renewed = Renewed} = Save) ->
    Now = erlang:monotonic_time(millisecond),
    case Now - Renewed < erllama_cache_host:renew_every() of
        true ->
            {ok, Save};
        false ->
            case check(Save) of
                ok -> {ok, Save#save{renewed = Now}};
                {error, _} = Error -> Error
            end
    end.

check(#save{host = Host, tier_srv = TierSrv, key = Key, token = Token}) ->
    Host:check(TierSrv, Key, Token).

publish(Root, Tmp, Save) ->
    try in_turn(Save, publish_call(Tmp, Save)) of
        {lost, Error} ->
            ok = erllama_cache_nif:abort(Tmp),
            Error;
        Progress ->
            published(Progress, Root, Tmp, Save)
    catch
        Class:Reason:Stack ->
            ok = erllama_cache_nif:abort(Tmp),
            cancel_after_exception(Save),
            erlang:raise(Class, Reason, Stack)
    end.

published(more, Root, Tmp, Save) ->
    Renewed = renew_if_it_stands(Save),
    Meanwhile = fun() ->
        _ = renew_if_it_stands(Renewed),
        ok
    end,
    Call = publish_call(Tmp, Renewed),
    Progress = erllama_cache_io_limit:run(Call, erllama_cache_host:renew_every(), Meanwhile),
    published(Progress, Root, Tmp, Renewed);
published({ok, Outcome, Size, Header}, Root, _Tmp, Save) ->
    ok = count_outcome(Outcome),
    announce(Root, Size, Header, Save);
published({error, _} = Error, _Root, _Tmp, Save) ->
    cancel_reservation(Save),
    Error.

publish_call(Tmp, #save{guard = Guard}) ->
    fun(Turn) -> erllama_cache_nif:publish(Turn, Guard, Tmp) end.

%% The file may have its name already. Whether the reservation was lost, or the host does not
%% answer, is for mark_published to tell.
renew_if_it_stands(Save) ->
    try renew(Save) of
        {ok, Renewed} -> Renewed;
        {error, _} -> Save
    catch
        _:_ -> Save
    end.

%% Whether a save is to stop: it has been cancelled, or its caller has died.
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
count_outcome(adopted) -> erllama_cache_metrics:count(adoptions);
count_outcome(replaced) -> erllama_cache_metrics:count(replacements).

%% The file stays from here on, whatever the host answers: it is whole, and the host adopts it.
announce(Root, Size, Header, #save{host = Host, tier_srv = TierSrv, key = Key, token = Token,
                                   tokens = Tokens, meta = #{save_reason := Reason}}) ->
    case Host:mark_published(TierSrv, Key, Token, Root) of
        ok ->
            case Host:announce(TierSrv, Key, Token, Size, Header, Tokens) of
                ok ->
                    ok = Host:count(TierSrv, {saved, Reason}),
                    {ok, Key};
                {error, _} = Error ->
                    Error
            end;
        {error, _} = Error ->
            Error
    end.

cancel_reservation(#save{host = Host, tier_srv = TierSrv, key = Key, token = Token}) ->
    ok = Host:cancel(TierSrv, Key, Token).

%% What is raised already is what the caller has to see. A host that cannot cancel either has no
%% reservation to leave behind, or forgets it when this process dies or its lease ends.
cancel_after_exception(Save) ->
    try
        cancel_reservation(Save)
    catch
        _:_ -> ok
    end.
